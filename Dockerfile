# The image of the job. docker/README.md describes how to build and run it.
# It works with BuildKit and the classic builder: no registry frontend, no mounts, no heredocs.
ARG BASE_IMAGE=debian:trixie-slim

FROM ${BASE_IMAGE} AS base
RUN { command -v tini && python3 -c "import ensurepip"; } >/dev/null || { \
      apt-get update && \
      apt-get install -y --no-install-recommends ca-certificates python3-venv tini && \
      rm -rf /var/lib/apt/lists/*; \
    }
# Use the system's certificate authorities, which may include private ones.
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt

FROM base AS build
ARG UV_DEFAULT_INDEX
ENV PATH=/build/tools/bin:$PATH UV_NO_CACHE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never
WORKDIR /build
COPY docker/requirements-build.lock ./
RUN python3 -m venv tools && \
    pip install --quiet --no-cache-dir --require-hashes ${UV_DEFAULT_INDEX:+--index-url "$UV_DEFAULT_INDEX"} \
      -r requirements-build.lock && \
    uv venv --quiet --python /usr/bin/python3 /opt/job
# Install the packages that all images share first, so a second image builds faster.
COPY docker/requirements-cpu.lock ./
RUN uv pip sync --quiet --python /opt/job --require-hashes --compile-bytecode \
      --build-constraints requirements-build.lock requirements-cpu.lock
ARG EXTRA=cpu
COPY docker/requirements-${EXTRA}.lock ./
RUN uv pip sync --quiet --python /opt/job --require-hashes --compile-bytecode \
      --build-constraints requirements-build.lock requirements-${EXTRA}.lock && \
    find /opt/job -type d -name tests -prune -exec rm -r {} + && \
    rm -f /opt/job/.lock
# The code is a small layer of its own, separate from its dependencies.
COPY pyproject.toml README.md LICENSE ./
COPY job job/
RUN uv pip install --quiet --python /opt/job --prefix /build/job-only --no-deps --compile-bytecode \
      --build-constraints requirements-build.lock .

FROM base
ARG EXTRA=cpu
ARG VERSION
ARG GIT_COMMIT
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin job && \
    mkdir -m 1777 /cache /work
COPY --from=build /opt/job /opt/job
COPY docker/entrypoint docker/healthcheck /usr/local/bin/
COPY --from=build /build/job-only /opt/job
ENV PATH=/opt/job/bin:$PATH \
    JAX_PLATFORMS=${EXTRA} \
    JOB_HEARTBEAT_FILE=/tmp/job-heartbeat \
    JOB_GIT_COMMIT=${GIT_COMMIT}
LABEL org.opencontainers.image.title="job" \
      org.opencontainers.image.description="LoRA fine-tuning as a batch job, measured before and after" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${GIT_COMMIT}"
USER job
WORKDIR /work
HEALTHCHECK --interval=30s --timeout=5s --start-period=5m CMD ["healthcheck"]
# Block signals until Python handles them, so that none is lost. tini forwards them.
ENTRYPOINT ["tini", "-g", "--", "env", "--block-signal=TERM,INT", "entrypoint"]
