# CPU by default:   docker build -t offline-rl-harness .
# CUDA:             docker build --build-arg TORCH_BACKEND=cu128 -t offline-rl-harness:cuda .
# Run:              docker run --shm-size=1g -v "$PWD/out:/out" offline-rl-harness quickstart
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# Build of torch: cpu, cu128, cu130, ... or empty for the package index's default.
ARG TORCH_BACKEND=cpu
# Recorded with every run: docker build --build-arg GIT_COMMIT=$(git rev-parse HEAD) ...
ARG GIT_COMMIT=""

# g++ and the C library's headers are what torch.compile needs on CPU; mesa's EGL renders off-screen.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libegl1 libgl1 tini \
 && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 harness \
 && mkdir -p /opt/harness /out \
 && chown harness:harness /opt/harness /out
WORKDIR /opt/harness

# Dependencies first: this layer is rebuilt only when they change.
COPY pyproject.toml constraints.txt README.md ./
RUN --mount=type=bind,target=/context,rw \
    python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --quiet uv \
 && if [ -d /context/wheels ]; then export UV_FIND_LINKS=/context/wheels; fi \
 && /opt/venv/bin/uv pip install --no-cache --quiet --python /opt/venv/bin/python \
      ${TORCH_BACKEND:+--torch-backend=${TORCH_BACKEND}} -c constraints.txt -r pyproject.toml \
      --extra postgres

COPY --chown=harness:harness . .
RUN /opt/venv/bin/uv pip install --no-cache --quiet --python /opt/venv/bin/python --no-deps -e . \
 && chown -R harness:harness /opt/harness

ENV PATH=/opt/venv/bin:$PATH \
    HARNESS_GIT_COMMIT=${GIT_COMMIT} \
    HARNESS_HOME=/out/runs \
    MINARI_DATASETS_PATH=/out/datasets \
    MUJOCO_GL=egl \
    PYTHONUNBUFFERED=1
USER harness
VOLUME /out
ENTRYPOINT ["tini", "--", "harness"]
CMD ["--help"]
