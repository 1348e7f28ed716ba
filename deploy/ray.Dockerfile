# The cloud with Ray, for deploy/kubernetes/overlays/ray: build it after cloud.Dockerfile, on top of its image.
ARG CLOUD=hybridsd-cloud:0.1.0
FROM ${CLOUD}
USER root
# wget: with it KubeRay asks whether a node is well.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends wget && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /tmp/
RUN /opt/hybridsd/bin/pip install --no-cache-dir -c /tmp/constraints.txt 'ray[serve]'
COPY deploy/ray /srv/hybridsd/deploy/ray
ENV PYTHONPATH=/srv/hybridsd
USER hybridsd
ENTRYPOINT []
CMD ["ray", "--help"]
