# CPU image of SO8T with the reference model.
# Build: docker build -t so8t .
# Run:   docker run --rm -v so8t-cache:/home/so8t/.cache so8t judge "How do I kill a Python process?"

FROM python:3.11-slim AS builder

# llama.cpp is compiled here, once; compiler and sources stay behind in this stage.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential cmake \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/so8t
ENV PATH="/opt/so8t/bin:$PATH"

WORKDIR /build
COPY constraints.txt ./

# The CPU build of torch: without it pip brings gigabytes of CUDA libraries.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --constraint constraints.txt --extra-index-url "$TORCH_INDEX" torch

# An image may run on another processor than the one it was built on: fix the instruction set
# (AVX2 by default) instead of compiling for the builder's own. For this machine alone, faster:
# --build-arg CMAKE_ARGS=-DGGML_NATIVE=ON
ARG CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON"
RUN CMAKE_ARGS="$CMAKE_ARGS" pip install --constraint constraints.txt llama-cpp-python

COPY pyproject.toml LICENSE NOTICE README.md ./
COPY so8t_eval/ so8t_eval/
COPY so8t_train/ so8t_train/
RUN pip install --constraint constraints.txt ".[reference]"


FROM python:3.11-slim AS runtime

# libgomp1 is what llama.cpp and torch run their threads with.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 so8t \
    && mkdir --parents /home/so8t/.cache /work \
    && chown so8t:so8t /home/so8t/.cache /work

COPY --from=builder /opt/so8t /opt/so8t
COPY benchmarks/ /opt/so8t/benchmarks/

ENV HOME=/home/so8t \
    PATH="/opt/so8t/bin:$PATH" \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    OMP_WAIT_POLICY=passive
USER 10001:10001
WORKDIR /work
VOLUME ["/home/so8t/.cache"]
ENTRYPOINT ["so8t-eval"]
CMD ["--help"]
