# Builds with the legacy builder and with BuildKit, without a frontend to download:
#   docker build --build-arg REVISION="$(git rev-parse HEAD)" -t megatron-xielu .
# Any base with torch and a C++ compiler will do: --build-arg BASE_IMAGE=...
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.08-py3
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}

USER 0
WORKDIR /opt/megatron_xielu

# what changes seldom comes first, so that a new revision rebuilds two small layers
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/*

# replaces the base's own, in images built on this one too
ENV PIP_CONSTRAINT=/opt/megatron_xielu/constraints.txt \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PIP_DISABLE_PIP_VERSION_CHECK=1
COPY pyproject.toml constraints.txt docker/install.py /opt/megatron_xielu/dependencies/
RUN python3 dependencies/install.py dependencies megatron hf gguf plot

# the CPU kernels of every instruction set are built here and found by any user
ENV MEGATRON_XIELU_CACHE=/opt/megatron_xielu/kernels \
    MEGATRON_XIELU_VERSIONS=/opt/megatron_xielu/versions.toml
COPY pyproject.toml README.md LICENSE /opt/megatron_xielu/source/
COPY megatron_xielu /opt/megatron_xielu/source/megatron_xielu
RUN python3 -m pip install --no-cache-dir --no-deps --no-build-isolation --compile ./source \
    && rm -rf source/build source/*.egg-info \
    && python3 -m megatron_xielu.ops.cpu \
    && python3 -c "import megatron.core, megatron_xielu, torch; print(torch.__version__)"
COPY docker/versions.toml docker/entrypoint.sh /opt/megatron_xielu/

ARG BASE_IMAGE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron_xielu" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      megatron_xielu.tested.torch="2.13.0" \
      megatron_xielu.tested.megatron-core="0.19.2"

# without it torchrun 2.13 never takes up a host that replaces another
ENV TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# the first user of most machines; `--user "$(id -u):$(id -g)"` gives any other
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["tini", "-s", "--", "/opt/megatron_xielu/entrypoint.sh"]
CMD ["--help"]
