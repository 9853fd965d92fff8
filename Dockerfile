# The trainer and SGLang for H200 nodes (sm_90; CUDA 13, driver 580 or newer):
#   docker build --tag megatron-troll .
# Versions are these arguments, constraints.txt (what is taken from PyPI) and examples/nemo_run/requirements.txt;
# tests/house/test_versions.py holds them together. CI has no container engine: it lints this file, no more.
ARG SGLANG=0.5.23
ARG TRANSFORMER_ENGINE=2.20.2
# The package `apex` on PyPI is not NVIDIA's.
ARG APEX=6424da3b4faa6c8f062da4a48c424fff3f02d42d

FROM lmsysorg/sglang:v${SGLANG} AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
COPY constraints.txt /tmp/constraints.txt
# What SGLang brings stays as it is, torch and its CUDA libraries first of all; the rest is added as pinned. numpy
# alone the trainer holds below what SGLang takes.
RUN python3 -m pip list --format=freeze --exclude-editable | grep -vi '^numpy==' >/opt/pinned.txt \
    && brought="$(cut -d= -f1 /opt/pinned.txt | paste -sd'|')" \
    && grep -viE "^($brought)==" /tmp/constraints.txt >>/opt/pinned.txt

FROM base AS build
ARG TRANSFORMER_ENGINE
ARG APEX
ENV MAX_JOBS=16 NVTE_PYTORCH_FORCE_BUILD=TRUE TORCH_CUDA_ARCH_LIST=9.0 APEX_CPP_EXT=1 APEX_CUDA_EXT=1
WORKDIR /wheels
# Transformer Engine's core comes compiled for CUDA 13; what binds it to torch is built against the image's torch.
RUN python3 -m pip install --constraint /opt/pinned.txt cmake ninja pybind11 setuptools \
    && python3 -m pip download --no-deps "transformer-engine==${TRANSFORMER_ENGINE}" "transformer-engine-cu13==${TRANSFORMER_ENGINE}" \
    && python3 -m pip wheel --no-deps --no-build-isolation "transformer-engine-torch==${TRANSFORMER_ENGINE}" \
        "git+https://github.com/NVIDIA/apex.git@${APEX}"
COPY . /opt/megatron-troll
WORKDIR /opt/megatron-troll
RUN make nemo-env PYTHON=python3

FROM base
COPY --from=build /opt/megatron-troll /opt/megatron-troll
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python3 -m pip install --constraint /opt/pinned.txt /wheels/*.whl flash-linear-attention --editable /opt/megatron-troll
RUN useradd --create-home --uid 10001 mtroll
USER 10001
WORKDIR /home/mtroll
# Apex can be built without its extensions, and is then of no use. There is no driver here: that the extensions import
# beside this torch is what `mtroll preflight` tries on a node. As the image's user, whose caches these are.
RUN python3 -c "import importlib.util as u; assert u.find_spec('amp_C') and u.find_spec('transformer_engine_torch')" \
    && mtroll --help
