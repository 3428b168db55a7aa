# Everything that trains: the teacher's stages, Ray's head and workers, and the one that submits the run.
#
# EXTRAS=gpu,cluster,s3,timm (default)  CUDA: torch from PyPI brings its CUDA libraries, several GB
# EXTRAS=cpu,cluster,s3,timm            with TORCH_INDEX=https://download.pytorch.org/whl/cpu: no CUDA, 1.9 GB
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG EXTRAS=gpu,cluster,s3,timm
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/distill
WORKDIR /src
# The dependencies, which change seldom, come as a layer of their own: those of a package that is empty yet.
COPY constraints.txt pyproject.toml ./
RUN for package in distill teacher_trainer teacher_server student_trainer export; do install -D /dev/null "$package/__init__.py"; done \
 && touch README.md LICENSE \
 && /opt/distill/bin/pip install -c constraints.txt ".[${EXTRAS}]" ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"}
COPY . .
RUN /opt/distill/bin/pip install --no-deps --force-reinstall .

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="distill trainer" \
      org.opencontainers.image.description="Trains teacher and students on Ray" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/distill /opt/distill
# Volumes take over owner and mode of the folder that they cover first: the group 0 writes, whatever user the container runs as.
RUN install -d -g 0 -m 2770 /run/secrets && install -d -g 0 -m 2775 /srv/distill /srv/distill/runs /var/cache/distill-tensorrt
# HOME: the root file system may be read-only. USER: Ray asks for a name, and the user id may have none.
ENV PATH=/opt/distill/bin:${PATH} HOME=/tmp USER=distill PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp/matplotlib RAY_USAGE_STATS_ENABLED=0 RAY_TRAIN_V2_ENABLED=1 RAY_worker_niceness=0 \
    GRPC_ENABLE_FORK_SUPPORT=0 GRPC_VERBOSITY=ERROR OMP_WAIT_POLICY=PASSIVE \
    MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776 MALLOC_TOP_PAD_=67108864
WORKDIR /srv/distill
USER 1000:0
STOPSIGNAL SIGTERM
CMD ["distill", "--help"]
