# TensorBoard over the run folders.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/tensorboard
WORKDIR /src
COPY constraints.txt ./
RUN /opt/tensorboard/bin/pip install -c constraints.txt tensorboard

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="distill tensorboard"
COPY --from=build /opt/tensorboard /opt/tensorboard
ENV PATH=/opt/tensorboard/bin:${PATH} HOME=/tmp PYTHONDONTWRITEBYTECODE=1
USER 1000:0
EXPOSE 6006
STOPSIGNAL SIGINT
ENTRYPOINT ["tensorboard", "--bind_all", "--port=6006"]
CMD ["--logdir=/srv/distill/runs"]
