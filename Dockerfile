# The connector (and the launcher's own commands) as a drop-in for cloudflare/cloudflared: same entry point, same user.
# Reproducible: versions and hashes come from requirements.lock, every file of the one layer below has SOURCE_DATE_EPOCH
# as its time and .pyc files are checked by content; pin the base too with --build-arg PYTHON_IMAGE=python:3.13-slim@sha256:...
ARG PYTHON_IMAGE=python:3.13-slim

FROM ${PYTHON_IMAGE} AS build
ARG SOURCE_DATE_EPOCH=1767225600
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1
WORKDIR /build
COPY requirements.lock ./
# No pip inside the environment: what runs needs none.
RUN python3 -m venv --without-pip /rootfs/opt/connector \
 && pip --python /rootfs/opt/connector/bin/python3 install --no-compile --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY connector connector
COPY launcher launcher
RUN pip --python /rootfs/opt/connector/bin/python3 install --no-compile --no-deps --no-build-isolation . \
 && pip --python /rootfs/opt/connector/bin/python3 uninstall -q -y amqtt hatchling editables pathspec pluggy trove-classifiers \
 && cd /rootfs/opt/connector \
 && rm -rf lib/python*/site-packages/tunnel_connector-*.dist-info/direct_url.json share include \
 && find . -depth -type d \( -name tests -o -name test -o -name __pycache__ \) -exec rm -rf {} + \
 && find . -name '*.so' -exec sh -c 'command -v strip >/dev/null && strip --strip-unneeded "$@" || true' sh {} + \
 && sed -i '1s|^#!.*|#!/opt/connector/bin/python3|' $(grep -l '^#!/rootfs' bin/*) \
 && sed -i 's|/rootfs/opt|/opt|g' pyvenv.cfg && sed -i '/^command = /d' pyvenv.cfg && rm -f bin/[Aa]ctivate* \
 && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash -s /rootfs /rootfs/opt/connector/lib \
 && mkdir -p /rootfs/etc/connector /rootfs/home/nonroot /rootfs/mosquitto/config /rootfs/mosquitto/data \
 && cp /etc/passwd /etc/group /rootfs/etc/ \
 && echo 'nonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin' >>/rootfs/etc/passwd \
 && echo 'nonroot:x:65532:' >>/rootfs/etc/group \
 && chown -R 65532:65532 /rootfs/home/nonroot /rootfs/etc/connector && chmod 700 /rootfs/etc/connector \
 && chown -R 1883:1883 /rootfs/mosquitto \
 && find /rootfs -exec touch -h -d "@${SOURCE_DATE_EPOCH}" {} +

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="tunnel-connector" \
      org.opencontainers.image.description="Cloudflare tunnel connector in asyncio, and a broker launcher" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      tunnel-connector.origin-defaults="1"
COPY --from=build /rootfs/ /
# TUNNEL_METRICS is read by `run` and by `ready`, so that the health check asks where the connector listens.
# CONNECTOR_RUNTIME tells that this is a container (metrics build type, addresses that others can reach).
ENV PATH=/opt/connector/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HOME=/home/nonroot \
    TUNNEL_METRICS=0.0.0.0:20241 \
    CONNECTOR_RUNTIME=container
USER 65532:65532
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s --retries=3 CMD ["cloudflared", "tunnel", "ready"]
ENTRYPOINT ["cloudflared", "--no-autoupdate"]
CMD ["version"]
