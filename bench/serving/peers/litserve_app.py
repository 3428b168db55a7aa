"""Peer: LitServe with its own batching over requests. It takes forms and JSON: crops come as a file of a form, or, where they are over the
megabyte that its queue between processes carries in this way, as base64 in JSON.

Run in the peers' environment: no module of this project is imported. Unit of data: one request of BENCH_REQUEST_IMAGES crops.
"""

import base64
import os

import litserve
import numpy as np
import onnxruntime

SIZE = int(os.environ["BENCH_IMAGE_SIZE"])
PER_REQUEST = int(os.environ["BENCH_REQUEST_IMAGES"])


class Teacher(litserve.LitAPI):
    def setup(self, device):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["BENCH_THREADS"])
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning threads would take the cores from HTTP
        self.session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"])

    def decode_request(self, request):
        crops = request["crops"]
        data = base64.b64decode(crops) if isinstance(crops, str) else crops.file.read()
        return np.frombuffer(data, np.uint8).reshape(-1, SIZE, SIZE, 3)

    def batch(self, inputs):
        return np.concatenate(inputs)

    def predict(self, crops_BHWC):
        if isinstance(crops_BHWC, list):  # without batching LitServe hands over what decode_request gave
            crops_BHWC = np.concatenate(crops_BHWC)
        temperature_B1 = np.ones((len(crops_BHWC), 1), np.float32)
        return self.session.run(["soft_labels"], {"images": crops_BHWC, "temperature": temperature_B1})[0]

    def unbatch(self, probs_BK):
        return [probs_BK[start : start + PER_REQUEST] for start in range(0, len(probs_BK), PER_REQUEST)]

    def encode_response(self, probs_BK):
        return {"soft_labels": base64.b64encode(np.ascontiguousarray(probs_BK).tobytes()).decode()}


if __name__ == "__main__":
    api = Teacher(max_batch_size=max(1, int(os.environ["BENCH_MAX_BATCH"]) // PER_REQUEST), batch_timeout=0.002)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=120, fast_queue=True)
    server.run(host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), generate_client_file=False, log_level="error")
