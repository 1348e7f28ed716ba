# The cloud: torch, diffusers and the gRPC service. Models are mounted, not built in.
#
# Without TORCH_INDEX pip takes the default build of torch, which brings CUDA along and runs on a GPU or a CPU. For a
# slim image of a machine without GPU, build with --build-arg TORCH_INDEX=<the index of PyTorch's CPU wheels>.
FROM python:3.11-slim AS build
ARG TORCH_INDEX=""
WORKDIR /src
RUN python -m venv /opt/hybridsd
ENV PATH=/opt/hybridsd/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt .
RUN pip install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
# What it needs comes first and by itself: a change of the sources installs none of it again.
COPY pyproject.toml deploy/requirements.py ./
RUN python requirements.py cloud > needed.txt && pip install -c constraints.txt -r needed.txt
COPY README.md LICENSE ./
COPY protos/hybridsd protos/hybridsd
COPY cloud_server cloud_server
COPY edge_client edge_client
COPY training training
RUN pip install -c constraints.txt '.[cloud]'

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home hybridsd
COPY --from=build /opt/hybridsd /opt/hybridsd
ENV PATH=/opt/hybridsd/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/home/hybridsd/.cache/huggingface
USER hybridsd
EXPOSE 50051
STOPSIGNAL SIGTERM
ENTRYPOINT ["hybridsd-cloud"]
CMD ["serve", "--help"]
