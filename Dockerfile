# The image of the job. Its base prepares for NVIDIA's driver; torch's wheels bring the rest of CUDA. Any Debian or Ubuntu
# with Python 3.11 or newer works as a base. Reasons: .github/decisions/0010-image.md. For GPUs older than Turing see
# infra/docker/README.md.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04@sha256:2ab6381d970b211fb93853796dc6707eb8a72575a375c422b17cf4d8b2641701

FROM ${BASE_IMAGE} AS base
# NCCL loads libibverbs where the machine has InfiniBand or RoCE; without it gradients go over TCP, unsaid.
# Versions of Debian's packages are not pinned: the archive keeps only the newest, with the security fixes.
# The base's setuid and setgid programs (su, mount, passwd) are of no use to a job: files lose these bits.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates ibverbs-providers libgomp1 libibverbs1 python3 \
 && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* \
 && find / -xdev -perm /6000 -exec chmod a-s {} +
# One folder for each layer below: torch and CUDA change seldom, the other packages sometimes, the job often. The paths hold
# `site-packages`, by which libraries recognize an installed package.
RUN python3 -m venv --without-pip /opt/venv \
 && printf '/opt/job\n/opt/torch/site-packages\n' >"$(echo /opt/venv/lib/python3*/site-packages)/job.pth" \
 && install -d -o 65532 -g 0 -m 0775 /work /work/runs /work/cache
ENV PATH=/opt/venv/bin:$PATH

FROM base AS build
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv \
 && python3 -m venv /opt/pip
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_NO_DEPS=1
WORKDIR /build
COPY requirements-cuda.lock ./
# Empty: torch from PyPI, by hash. Otherwise the index of another build of that version, which is then trusted.
ARG TORCH_INDEX=
RUN if [ -z "$TORCH_INDEX" ]; then \
      /opt/pip/bin/pip install -q --target /opt/torch/site-packages --require-hashes -r requirements-cuda.lock; \
    else \
      PIP_NO_DEPS=0 /opt/pip/bin/pip install -q --target /opt/torch/site-packages --index-url "$TORCH_INDEX" \
        "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements-cuda.lock)"; \
    fi \
 && rm -r /opt/torch/site-packages/bin
COPY requirements.lock ./
# A few packages have no wheels: they are built with setuptools, which comes from the lock as well.
RUN sed -n '/^setuptools==/,/[^\\]$/p' requirements.lock >setuptools.lock \
 && /opt/pip/bin/pip install -q --require-hashes -r setuptools.lock \
 && /opt/pip/bin/pip install -q --no-build-isolation --require-hashes -r requirements.lock \
      --target "$(echo /opt/venv/lib/python3*/site-packages)" \
 && rm -r /opt/venv/lib/python3*/site-packages/bin
# For the entrypoint, which compares the machine with it: the CUDA version of torch, and the least compute capability that
# torch and bitsandbytes (6.0) both support.
RUN mkdir -p /opt/job/triton \
 && python -c 'import re, torch; arch = [int(n) for n in re.findall(r"sm_(\d+)", getattr(torch._C, "_cuda_getArchFlags", str)() or "")]; \
      print(torch.version.cuda or "none", max(60, min(arch, default=0)) / 10)' >/opt/job/cuda
# When Triton first uses a GPU it compiles a C file. Compiling it here keeps the compiler out of the image. There is no
# driver, so it is linked against a stand-in for its library, which needs the functions that the file calls: without them
# the linker leaves the library out, and on a GPU the file cannot be loaded. The first, failing try tells their names.
RUN set -e; if [ -d /opt/torch/site-packages/triton ]; then \
      export TRITON_LIBCUDA_PATH=/build TRITON_CACHE_DIR=/opt/job/triton LD_LIBRARY_PATH=/build; \
      stand_in() { gcc -shared -o libcuda.so.1 -Wl,-soname,libcuda.so.1 -x c "$1"; }; \
      compile() { python -c 'from triton.backends.nvidia.driver import CudaUtils; CudaUtils()'; }; \
      stand_in /dev/null; compile 2>/dev/null || true; \
      nm -D --undefined-only /opt/job/triton/*/cuda_utils*.so >missing; \
      sed -nE 's/.* (cu[A-Z][A-Za-z0-9_]*).*/void \1(void) {}/p' missing >driver.c; \
      rm -r /opt/job/triton; stand_in driver.c; compile; \
      readelf -d /opt/job/triton/*/cuda_utils*.so >needed; grep 'NEEDED.*libcuda' needed; \
    fi
# What no run opens: bitsandbytes' libraries for other CUDA versions and GPUs, static libraries, tests of packages. Where
# bitsandbytes has none for torch's version, such as 12.9, it takes another of the same major version: those are kept.
RUN cuda=$(sed 's/ .*//; s/[.]//' /opt/job/cuda) \
 && { [ -e "$(echo /opt/venv/lib/python3*/site-packages/bitsandbytes)/libbitsandbytes_cuda$cuda.so" ] || cuda="${cuda%?}?"; } \
 && find /opt/venv/lib -name 'libbitsandbytes_*.so' \
      ! -name libbitsandbytes_cpu.so ! -name "libbitsandbytes_cuda$cuda.so" -delete \
 && for package in networkx numpy pandas pyarrow scipy sklearn sympy; do \
      find /opt/venv/lib/python3*/site-packages/$package -type d -name tests -prune -exec rm -r {} + || exit; \
    done \
 && find /opt/torch /opt/venv/lib -name '*.a' -delete
RUN python -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/torch /opt/venv/lib || true
COPY job /opt/job/job
ARG REVISION=
RUN if [ -n "$REVISION" ]; then echo "$REVISION" >/opt/job/job/COMMIT; fi \
 && python -m compileall -qq --invalidation-mode unchecked-hash /opt/job \
 && TORCHDYNAMO_DISABLE=1 python -m job.stages.preload >/opt/job/read-ahead
# The list of what a run imports, which the entrypoint has read while it asks for GPUs: 7,000 small files, one by one,
# take longer from a disk than everything else about imports.

FROM base
COPY --from=build /opt/torch /opt/torch
COPY --from=build /opt/venv/lib /opt/venv/lib
COPY --from=build /opt/job /opt/job
COPY entrypoint.sh /opt/job/
# Works for any user id and with a read-only root file system: libraries write below /tmp (HOME). NVIDIA's runtime would
# refuse to start the container on an old driver; the entrypoint checks the driver instead, and says what to do.
# /usr/local/nvidia is where GKE mounts driver and nvidia-smi; NVIDIA's images of CUDA 12.8.1 and newer do not look there.
ENV PATH=$PATH:/usr/local/nvidia/bin \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
ENV HOME=/tmp USER=job PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 NVIDIA_DISABLE_REQUIRE=true
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="qlora-job" \
      org.opencontainers.image.description="QLoRA fine-tuning as one batch job that survives preemption" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
WORKDIR /work
USER 65532:65532
ENTRYPOINT ["/opt/job/entrypoint.sh"]
