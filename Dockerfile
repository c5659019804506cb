# CPU:    docker build -t offline-rl-harness --build-arg GIT_COMMIT=$(git rev-parse HEAD) .
# CUDA:   docker build -t offline-rl-harness:cuda --build-arg TORCH_BACKEND=cu130 .
# Run:    docker run --rm --shm-size=1g -v "$PWD/out:/out" offline-rl-harness quickstart
#         (the CUDA image: add --gpus all)
#
# Wheels in a folder wheels/ of the build context are preferred to the package index, torch's too.
ARG BASE=python:3.11-slim-bookworm

# ---------------------------------------------------------------- the environment, built apart
FROM ${BASE} AS build
# Build of torch: cpu or cu130, as there are locks; empty is the package index's, which is cu130.
ARG TORCH_BACKEND=cpu
ENV UV_CACHE_DIR=/var/cache/uv UV_LINK_MODE=copy
RUN python3 -m venv /opt/uv \
 && /opt/uv/bin/pip install --no-cache-dir --quiet uv \
 && python3 -m venv --without-pip /opt/venv

# Dependencies first: this layer is built again only when they change. Byte code is compiled here
# because the user below cannot write it, and every Ray worker would compile torch anew.
WORKDIR /build
COPY pyproject.toml constraints.txt docker/constraints-cuda.txt wheel[s] ./
RUN --mount=type=cache,target=/var/cache/uv \
    case "${TORCH_BACKEND}" in \
      cpu) lock=constraints.txt ;; \
      cu130|"") lock=constraints-cuda.txt ;; \
      *) echo "TORCH_BACKEND=${TORCH_BACKEND} has no lock; expected cpu or cu130" >&2; exit 2 ;; \
    esac \
 && backend=${TORCH_BACKEND:+--torch-backend=${TORCH_BACKEND}} \
 && for wheel in torch-*.whl; do test ! -e "${wheel}" || backend=; done \
 && /opt/uv/bin/uv pip install --quiet --python /opt/venv/bin/python --compile-bytecode \
      --find-links . ${backend} \
      -c "${lock}" -r pyproject.toml --extra postgres \
 && cd /opt/venv/lib/python3*/site-packages \
 && find numpy matplotlib pandas pyarrow scipy statsmodels sympy -type d -name tests -prune \
      -exec rm -rf {} +

COPY . /opt/harness
RUN --mount=type=cache,target=/var/cache/uv \
    rm -rf /opt/harness/wheels \
 && /opt/uv/bin/uv pip install --quiet --python /opt/venv/bin/python --no-deps -e /opt/harness \
 && rm -rf /opt/harness/build \
 && /opt/venv/bin/python -m compileall -q /opt/harness

# ------------------------------------------------------------------------------------ the image
FROM ${BASE}
# g++ is what torch.compile needs on CPU (and Triton on CUDA); tini reaps Ray's processes.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ tini \
 && rm -rf /var/lib/apt/lists/*

# Any user may run the image (`--user $(id -u)`), so home and output are open to all.
RUN useradd --create-home --uid 1000 harness \
 && mkdir -p /out \
 && chmod 1777 /out /home/harness

COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/harness /opt/harness

# USER, HOME: torch and Ray ask for them also when the uid has no name. MuJoCo needs no OpenGL here.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/harness \
    USER=harness \
    HARNESS_HOME=/out/runs \
    MINARI_DATASETS_PATH=/out/datasets \
    MUJOCO_GL=disabled \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# Last, since it changes with every build: the commit that is recorded with every run.
ARG GIT_COMMIT=""
ENV HARNESS_GIT_COMMIT=${GIT_COMMIT}
LABEL org.opencontainers.image.title="offline-rl-harness" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="${GIT_COMMIT}"

WORKDIR /opt/harness
USER harness
ENTRYPOINT ["tini", "--", "harness"]
CMD ["--help"]
