# Two images of one server, neither with a model inside: `--target cpu` (the default) and `--target cuda`. Both run as
# UID 10001 of group 0 on a read-only root. Building, running, sizes: deploy/README.md.
#
# Each RUN that fetches Python packages reads the secret `pip.conf` where one is given, for a mirror of the package index:
#   docker build --secret id=pip.conf,src=$HOME/.config/pip/pip.conf .
# A release pins the base by digest: --build-arg PYTHON_IMAGE=docker.io/library/python:3.12-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=docker.io/library/python:3.12-slim-bookworm


# What both images are built in; nothing of it gets into them but /opt/nvfp4.
FROM ${PYTHON_IMAGE} AS build
# Any recent g++ will do; Debian's release fixes which.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/nvfp4
ENV PATH=/opt/nvfp4/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1


# Our wheel: Python, and native kernels for every ISA, chosen at run time.
FROM build AS wheel
WORKDIR /src
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY nvfp4_runtime nvfp4_runtime
COPY server server
COPY loadtest loadtest
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf pip wheel --no-deps --wheel-dir /wheels .


# torch before our wheel: it is most of the image and seldom changes.
FROM build AS packages-cpu
ARG TORCH=torch==2.13.0
# The index of CPU builds: the default one would bring several gigabytes of CUDA. Empty: as pip is set up.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# What only developers of torch, numpy and sympy use goes: headers, test programs, test suites, and the names of functions
# that are not exported, a quarter of libtorch. So does pip. Their folder's name depends on the base's Python: hence `cd`.
# hadolint ignore=DL3003,DL3013
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH" \
    && cd "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    && rm -rf torch/include torch/test torch/share/cmake \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && strip --strip-unneeded torch/lib/*.so
COPY deploy/constraints.txt /tmp/constraints.txt
COPY --from=wheel /wheels /wheels
ARG EXTRAS=otel
# hadolint ignore=DL3003
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --constraint /tmp/constraints.txt "$(echo /wheels/*.whl)[$EXTRAS]" \
    && pip freeze > /opt/nvfp4/packages.txt \
    && cd "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    && find numpy sympy networkx mpmath -depth -type d -name tests -exec rm -rf {} + \
    && python -m pip uninstall --yes pip


# The same with PyPI's torch, which brings CUDA's libraries and Triton. The driver comes from the machine.
FROM build AS packages-cuda
ARG TORCH=torch==2.13.0
# hadolint ignore=DL3003,DL3013
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install "$TORCH" \
    && cd "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    && rm -rf torch/include torch/test torch/share/cmake \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && find nvidia -name '*.a' -delete \
    && strip --strip-unneeded torch/lib/libtorch_cpu.so torch/lib/libtorch_python.so
COPY deploy/constraints.txt /tmp/constraints.txt
COPY --from=wheel /wheels /wheels
ARG EXTRAS=otel
# hadolint ignore=DL3003
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --constraint /tmp/constraints.txt "$(echo /wheels/*.whl)[$EXTRAS]" \
    && pip freeze > /opt/nvfp4/packages.txt \
    && cd "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    && find numpy sympy networkx mpmath -depth -type d -name tests -exec rm -rf {} + \
    && python -m pip uninstall --yes pip


# What both images are beside their packages.
FROM ${PYTHON_IMAGE} AS base
# A named user, since some libraries look their own name up; group 0, so that any UID a cluster picks can write /cache.
RUN useradd --uid 10001 --gid 0 --no-create-home --home-dir /cache --shell /usr/sbin/nologin nvfp4 \
    && install --directory --owner=10001 --group=0 --mode=0775 /cache
# Flags by environment, so that a container's environment or arguments can change them; HOME for a UID without a name.
ENV PATH=/opt/nvfp4/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HUB_OFFLINE=1 \
    NVFP4_HOST=0.0.0.0 \
    NVFP4_PORT=8000
USER 10001:0
WORKDIR /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
# 503, or silence, until the model is loaded and after the engine has died. start-period covers loading a large model.
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"NVFP4_PORT\"]}/health', timeout=2)"]
# Without a shell: the server is PID 1 and gets SIGTERM itself.
ENTRYPOINT ["nvfp4", "serve"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="nvfp4" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"


FROM base AS cuda
# Triton compiles a small C file for each kernel it launches, with the headers of the base image's Python.
# hadolint ignore=DL3002
USER 0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER 10001:0
COPY --from=packages-cuda /opt/nvfp4 /opt/nvfp4
# The container toolkit mounts the driver by these; kernels that Triton compiled are kept where a volume may lie.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/cache/triton
LABEL org.opencontainers.image.description="OpenAI-compatible server for NVFP4 models, NVIDIA GPUs"


FROM base AS cpu
COPY --from=packages-cpu /opt/nvfp4 /opt/nvfp4
LABEL org.opencontainers.image.description="OpenAI-compatible server for NVFP4 models, CPU"
