# docker build -t mmlavit .                           for the CPU
# docker build -t mmlavit --build-arg DEVICE=cuda .   for GPUs
# docker run --rm -it --shm-size 8g mmlavit bash tools/demo.sh    GPUs: --gpus all
# docker run --rm -it --shm-size 8g mmlavit bash tools/test.sh
#
# docs/installation.md says more. Tests parse this file; nobody has built it yet.
# The CUDA release is torch's own (requirements/lock.txt, cuda-toolkit), since
# mmcv's ops are compiled here.
ARG DEVICE=cpu

FROM ubuntu:24.04 AS cpu
ENV MMCV_CUDA_OPS=0

FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS cuda
ENV MMCV_CUDA_OPS=build
# A100, RTX 30, H100, and newer ones by its PTX.
ENV TORCH_CUDA_ARCH_LIST="8.0 8.6 9.0+PTX"

FROM ${DEVICE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential ca-certificates python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /mmlavit
COPY . .
RUN PIP_NO_CACHE_DIR=1 bash tools/setup_env.sh
ENV PATH=/mmlavit/.venv/bin:$PATH
CMD ["bash"]
