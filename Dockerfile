# The workflow in a container; artifacts and the MLflow store live in the working folder: mount a volume there.
#
#   docker build -t dpar .
#   docker run --rm -it -v dpar:/home/dpar/project dpar
#   docker build --build-arg TORCH=cuda -t dpar:cuda .
#   docker run --rm -it --gpus all --shm-size 8g -v dpar:/home/dpar/project dpar:cuda
FROM python:3.13-slim

# cpu, or cuda: the latter brings CUDA with it, the host needs a driver alone.
ARG TORCH=cpu
ARG UID=1000

RUN apt-get update \
    && apt-get install -y --no-install-recommends git make g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid "$UID" dpar
USER dpar
WORKDIR /home/dpar/project

RUN python -m venv /home/dpar/venv
ENV PATH=/home/dpar/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Every file is held against its hash (`make lock` renews them), what packages are built with included. CPU builds of torch are
# found in an index of their own; the hashes keep anything else from coming from there.
COPY --chown=dpar requirements requirements
RUN pip install --require-hashes --no-deps -r requirements/build.lock \
    && pip install --require-hashes --no-deps --no-build-isolation --extra-index-url https://download.pytorch.org/whl/cpu \
       -r requirements/image.lock -r "requirements/torch-$TORCH.lock" \
    && pip check
COPY --chown=dpar . .
RUN pip install --no-deps --no-build-isolation --no-index -e .

CMD ["dpar-cli", "run"]
