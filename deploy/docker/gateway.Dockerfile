# The REST gateway, and the verbs that need neither torch nor Ray (`distill gateway`, `distill keys`): 230 MB on top of Python.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/distill
WORKDIR /src
# What changes seldom comes first: the layer of dependencies is made anew only when one of them changes.
COPY constraints.txt deploy/docker/gateway-requirements.txt ./
RUN /opt/distill/bin/pip install -c constraints.txt -r gateway-requirements.txt
COPY . .
RUN /opt/distill/bin/pip install --no-deps .

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="distill gateway" \
      org.opencontainers.image.description="Soft labels over REST, before a Triton that serves the teacher" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/distill /opt/distill
COPY deploy/docker/make_secrets.sh /usr/local/bin/make-secrets
# Volumes take over the owner of the folder that they cover: the group 0 writes, whatever user the container runs as.
RUN install -d -g 0 -m 2770 /run/secrets && for reader in gateway metrics ray grafana; do install -d -g 0 -m 2770 "/run/make-secrets/$reader"; done
ENV PATH=/opt/distill/bin:${PATH} HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 1000:0
EXPOSE 8080
STOPSIGNAL SIGTERM
ENTRYPOINT ["distill"]
CMD ["--help"]
