# CPU image: build and run stages, no model inside, runs as UID 10001 on a read-only root. See deploy/README.md.
FROM python:3.12-slim AS build

# The build needs any recent g++; Debian's release fixes which.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/nvfp4
ENV PATH=/opt/nvfp4/bin:$PATH

# torch first, from the index of CPU builds: the default index would bring several gigabytes of CUDA.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Pinned, in TORCH.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --disable-pip-version-check "$TORCH" --index-url "$TORCH_INDEX"

WORKDIR /src
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY nvfp4_runtime nvfp4_runtime
COPY server server
COPY loadtest loadtest
RUN pip install --no-cache-dir --disable-pip-version-check .


FROM python:3.12-slim

LABEL org.opencontainers.image.title="nvfp4" \
      org.opencontainers.image.description="OpenAI-compatible server for NVFP4 models, CPU" \
      org.opencontainers.image.licenses="Apache-2.0"

# A named user, since some libraries look their own name up; group 0, so that any UID a cluster picks can write /cache.
RUN useradd --uid 10001 --gid 0 --no-create-home --home-dir /cache --shell /usr/sbin/nologin nvfp4 \
    && install --directory --owner=10001 --group=0 --mode=0775 /cache
COPY --from=build /opt/nvfp4 /opt/nvfp4
ENV PATH=/opt/nvfp4/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/cache \
    HF_HUB_OFFLINE=1

USER 10001:0
WORKDIR /cache
EXPOSE 8000
# /health is 503 until the model is loaded and after the engine has died. start-period covers loading a large model.
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["nvfp4", "serve", "--host", "0.0.0.0", "--port", "8000"]
