# Triton for machines without a GPU: the server of NVIDIA's wheel (2.51.0) with our ONNX Runtime backend, the one that `distill install-triton`
# installs. 335 MB on top of Python; NVIDIA's own image, which serves GPUs (docker-compose.yml), has many GB.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1
WORKDIR /src
COPY distill ./distill
COPY teacher_server ./teacher_server
# The folder is final: the environment of the server's Python stub holds absolute paths.
RUN python -c "from pathlib import Path; from teacher_server.triton_install import install_triton; install_triton(Path('/opt/triton'))"

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="distill triton-cpu" \
      org.opencontainers.image.description="Triton Inference Server 2.51.0 on CPUs" \
      org.opencontainers.image.version="${VERSION}"
COPY --from=build /opt/triton /opt/triton
# PATH leads the Python stub to its own packages.
ENV PATH=/opt/triton/python/bin:/opt/triton/pytriton/pytriton/tritonserver/bin:${PATH} HOME=/tmp PYTHONDONTWRITEBYTECODE=1
USER 1000:0
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
ENTRYPOINT ["tritonserver", "--backend-directory=/opt/triton/pytriton/pytriton/tritonserver/backends", \
            "--cache-directory=/opt/triton/pytriton/pytriton/tritonserver/caches"]
