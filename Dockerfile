# The workflow in a container; artifacts and the MLflow store live in the working folder: mount a volume there.
#
#   docker build -t dpar .
#   docker run --rm -it -v dpar:/home/dpar/project dpar
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t dpar:cuda .
#   docker run --rm -it --gpus all --shm-size 8g -v dpar:/home/dpar/project dpar:cuda
FROM python:3.13-slim

# Where torch comes from: CPU wheels, or CUDA ones (they bring CUDA with them; the host needs a driver alone).
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG UID=1000

RUN apt-get update \
    && apt-get install -y --no-install-recommends git make g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid "$UID" dpar
USER dpar
WORKDIR /home/dpar/project

RUN python -m venv /home/dpar/venv
ENV PATH=/home/dpar/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY --chown=dpar constraints.txt ./
RUN pip install -c constraints.txt --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple torch
COPY --chown=dpar . .
RUN pip install -c constraints.txt -e .

CMD ["dpar-cli", "run"]
