# CPU workers:  docker build -t pipetune . && docker run -v "$PWD:/work" pipetune demo
# GPUs:         docker build --build-arg TORCH=cu130 -t pipetune:cuda .
#               docker run --gpus all --ipc host -v "$PWD:/work" pipetune:cuda doctor
FROM python:3.12-slim
# Which builds of torch: a folder of download.pytorch.org/whl. Those for CUDA bring all of it but the driver.
ARG TORCH=cpu
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY bench bench
COPY tuner tuner
COPY pipetune pipetune
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url "https://download.pytorch.org/whl/${TORCH}" . \
    && useradd --uid 1000 --create-home pipetune \
    && install -d -o pipetune /work
USER 1000
WORKDIR /work
ENTRYPOINT ["pipetune"]
CMD ["--help"]
