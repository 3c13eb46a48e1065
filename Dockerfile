# The README's installation in an image. Data and results stay outside:
#     docker build -t crucible .
#     docker run --rm -v "$PWD/experiments:/crucible/experiments" crucible technique=mixup
#     docker run --rm --gpus all --shm-size=8g -v /data:/data -v "$PWD/experiments:/crucible/experiments" \
#         crucible model=resnet data=imagenet data.module.data_root_dir=/data/imagenet
#     docker run --rm -v "$PWD/experiments:/crucible/experiments" --entrypoint python crucible report.py runs=experiments/digits
FROM python:3.12-slim
# git: a run records its commit
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR /crucible
COPY . .
ENV PIP_NO_CACHE_DIR=1
RUN python3 -m venv .venv && .venv/bin/pip install -q -e .
ENV PATH=/crucible/.venv/bin:$PATH
ENTRYPOINT ["python", "main.py"]
