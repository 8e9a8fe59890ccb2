# The images of Backcast: `serve`, which is built by default, and `train`. docs/deployment.md says
# how they are built and run.

# A tag, so that a rebuild takes up what was mended; name a digest where builds must be the same.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN python -m venv --without-pip /opt/backcast \
 && python -m venv /opt/backend
COPY requirements/ requirements/
RUN python -m pip --python /opt/backcast install --no-deps --require-hashes \
      -r requirements/service.txt -r requirements/otel.txt
# The index that torch comes from decides between its builds: this one has those for the CPU; no
# value stands for the default index, whose Linux build is for CUDA (docs/adr/0005).
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m pip --python /opt/backcast install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
      -r requirements/torch.txt
COPY pyproject.toml README.md ./
COPY backcast/ backcast/
RUN /opt/backend/bin/pip install --no-deps --require-hashes -r requirements/build.txt \
 && /opt/backend/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /opt/wheel . \
 && python -m pip --python /opt/backcast install --no-deps --no-index --find-links /opt/wheel backcast \
 && python -m pip --python /opt/backcast check

FROM build AS build-train
RUN python -m pip --python /opt/backcast install --no-deps --require-hashes \
      -r requirements/train.txt \
 && python -m pip --python /opt/backcast check

# What both images have in common. The root file system may be read-only: what is written goes to
# /var/lib/backcast, a volume, and to /tmp.
FROM ${PYTHON_IMAGE} AS common
LABEL org.opencontainers.image.title="Backcast" \
      org.opencontainers.image.description="Serve every historical version of an embedding from the latest one." \
      org.opencontainers.image.version="0.1.0"
ENV PATH=/opt/backcast/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    BACKCAST_HOME=/var/lib/backcast \
    BACKCAST_LOG_FORMAT=json
RUN mkdir -p /var/lib/backcast && chown 10001:10001 /var/lib/backcast
WORKDIR /app
COPY migrations/ migrations/
COPY service/ service/
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["backcast"]

FROM common AS train
COPY --from=build-train /opt/backcast /opt/backcast
COPY trainer/ trainer/
CMD ["--help"]

FROM common AS serve
COPY --from=build /opt/backcast /opt/backcast
EXPOSE 8000
# Whether the process answers. Whether it can serve is for who sends it requests to ask: /readyz.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "from http.client import HTTPConnection as C; c = C('127.0.0.1', 8000, timeout=4); c.request('GET', '/livez'); raise SystemExit(c.getresponse().status != 200)"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
