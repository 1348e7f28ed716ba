# The edge: ONNX Runtime, numpy and the web gateway; no torch. The bundle is mounted, not built in.
FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /opt/hybridsd
ENV PATH=/opt/hybridsd/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# What it needs comes first and by itself: a change of the sources installs none of it again.
COPY constraints.txt pyproject.toml deploy/requirements.py ./
RUN python requirements.py edge postgres fsspec > needed.txt && pip install -c constraints.txt -r needed.txt
COPY README.md LICENSE ./
COPY protos/hybridsd protos/hybridsd
COPY cloud_server cloud_server
COPY edge_client edge_client
COPY training training
RUN pip install -c constraints.txt '.[edge,postgres,fsspec]'

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home hybridsd && install -d -o hybridsd -g hybridsd /data
COPY --from=build /opt/hybridsd /opt/hybridsd
ENV PATH=/opt/hybridsd/bin:$PATH PYTHONUNBUFFERED=1 HYBRIDSD_EDGE_CACHE=/data/cache
USER hybridsd
VOLUME /data
EXPOSE 8080
STOPSIGNAL SIGTERM
ENTRYPOINT ["hybridsd"]
CMD ["serve", "--help"]
