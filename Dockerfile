# Two images of one file; whatever they need at run time is in them, and nothing is downloaded there.
#
#   docker build --target cpu -t turnwise:cpu .
#   docker build --target cuda -t turnwise:cuda .          # run with --gpus all
#
# TORCH_INDEX: where the CPU build of torch is had. BASE: a Debian with Python 3.11 or later.
ARG BASE=docker.io/library/debian:bookworm-slim

FROM ${BASE} AS base
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 turnwise \
    && python3 -m venv /opt/turnwise
ENV PATH=/opt/turnwise/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt /opt/

FROM base AS wheel
COPY . /src
RUN pip wheel --no-deps --wheel-dir /wheels /src

FROM base AS torch-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url "${TORCH_INDEX}" "$(grep '^torch==' /opt/constraints.txt)"

FROM base AS torch-cuda
RUN pip install "$(grep '^torch==' /opt/constraints.txt)"

FROM torch-cpu AS cpu
COPY --from=wheel /wheels /wheels
RUN pip install --constraint /opt/constraints.txt "$(echo /wheels/*.whl)[all,ray]" "ray[default]" \
    && ln -s /opt/turnwise/bin/ray /opt/turnwise/bin/turnwise /opt/turnwise/bin/python /usr/local/bin/
# A hub name is found in the cache that is mounted, or not at all; HF_HUB_OFFLINE=0 lets it be fetched.
ENV HF_HUB_OFFLINE=1 TURNWISE_CACHE=/work/cache PYTHONUNBUFFERED=1
USER turnwise
WORKDIR /work
ENTRYPOINT ["tini", "--", "turnwise"]
CMD ["--help"]

FROM torch-cuda AS cuda
COPY --from=wheel /wheels /wheels
RUN pip install --constraint /opt/constraints.txt "$(echo /wheels/*.whl)[all,ray]" "ray[default]" \
    && ln -s /opt/turnwise/bin/ray /opt/turnwise/bin/turnwise /opt/turnwise/bin/python /usr/local/bin/
ENV HF_HUB_OFFLINE=1 TURNWISE_CACHE=/work/cache PYTHONUNBUFFERED=1
USER turnwise
WORKDIR /work
ENTRYPOINT ["tini", "--", "turnwise"]
CMD ["--help"]
