# The trainer and SGLang on H200 nodes (sm_90; CUDA 13, driver 580 or newer):
#   docker build --tag megatron-troll .
# Versions are these arguments and two lists that are copied in, constraints.txt (what is taken from PyPI) and
# examples/nemo_run/requirements.txt; tests/house/test_versions.py holds them together.
ARG SGLANG=0.5.23
ARG MEGATRON_CORE=0.16.1
# v2.11, the newest that megatron-core asks for
ARG TRANSFORMER_ENGINE=c188b533cc3721ca9c6bbfd26148f5cf60108c25
# NVIDIA's Apex has no releases on PyPI: the package of that name there is another
ARG APEX=6424da3b4faa6c8f062da4a48c424fff3f02d42d
ARG FLASH_LINEAR_ATTENTION=0.4.2

FROM lmsysorg/sglang:v${SGLANG} AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
# What is installed is only added to: torch, its CUDA libraries and all that SGLang brings stay as they are.
COPY constraints.txt /tmp/constraints.txt
RUN python3 -m pip list --format=freeze --exclude-editable >/opt/base.txt \
    && brought="$(cut -d= -f1 /opt/base.txt | paste -sd'|')" \
    && grep -viE "^($brought)==" /tmp/constraints.txt >/opt/added.txt

FROM base AS build
ARG TRANSFORMER_ENGINE
ARG APEX
ENV MAX_JOBS=16 NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS=90 TORCH_CUDA_ARCH_LIST=9.0 APEX_CPP_EXT=1 APEX_CUDA_EXT=1
WORKDIR /wheels
RUN python3 -m pip wheel --no-build-isolation --no-deps \
        "git+https://github.com/NVIDIA/TransformerEngine.git@${TRANSFORMER_ENGINE}" \
        "git+https://github.com/NVIDIA/apex.git@${APEX}"
COPY . /opt/megatron-troll
WORKDIR /opt/megatron-troll
RUN make nemo-env PYTHON=python3

FROM base
ARG MEGATRON_CORE
ARG FLASH_LINEAR_ATTENTION
COPY --from=build /opt/megatron-troll /opt/megatron-troll
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python3 -m pip install --no-deps /wheels/*.whl "megatron-core==${MEGATRON_CORE}" \
    && python3 -m pip install --constraint /opt/base.txt --constraint /opt/added.txt \
        "flash-linear-attention==${FLASH_LINEAR_ATTENTION}" --editable /opt/megatron-troll
# Apex without its extensions would be found too, and would be of no use.
RUN python3 -c "import importlib.util as u; assert u.find_spec('amp_C') and u.find_spec('transformer_engine_torch')" \
    && mtroll --help
RUN useradd --create-home --uid 10001 mtroll
USER mtroll
WORKDIR /home/mtroll
