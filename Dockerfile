# `make image` builds it. Any image with Python 3.11 or later as `python3` will do as BASE; docs/deployment.md pins one.
ARG BASE=python:3.13-slim

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
# The tools that make the wheel stay in a virtual environment that is left behind.
COPY requirements/build.txt requirements/runtime.txt requirements/
RUN python3 -m venv /opt/build \
    && /opt/build/bin/pip install --require-hashes -r requirements/build.txt \
    && python3 -m venv --without-pip /opt/app \
    && /opt/build/bin/pip --python /opt/app/bin/python install --no-compile --require-hashes -r requirements/runtime.txt
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY src src
COPY scripts/sbom.py scripts/sbom.py
# Bytecode is compiled here: the container cannot write it, so every start would compile again.
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir wheel . \
    && /opt/build/bin/pip --python /opt/app/bin/python install --no-compile --no-deps wheel/*.whl \
    && python3 scripts/sbom.py > /opt/app/sbom.cdx.json \
    && python3 -m compileall -q --invalidation-mode unchecked-hash /opt/app

FROM ${BASE}
ARG VERSION=1.0.0
ARG REVISION=
LABEL org.opencontainers.image.title="k8s-consul-registrar" \
    org.opencontainers.image.description="Keeps Consul equal to what a Kubernetes cluster wants scraped, and relays node metrics" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
# The base's own library too, which comes without bytecode. What installs software leaves: nothing here needs it.
RUN library=$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))') \
    && rm -rf "$library/ensurepip" "$library/idlelib" "$library/test" "$library/tkinter" /usr/share/python-wheels \
    && python3 -m compileall -q --invalidation-mode unchecked-hash -x 'lib2to3|site-packages|dist-packages' "$library" \
    && rm -rf "$library/site-packages/pip" "$library"/site-packages/pip-*.dist-info /usr/local/bin/pip*
COPY --from=build /opt/app /opt/app
ENV PATH=/opt/app/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# By number, so that runAsNonRoot can be checked without the image's user list.
USER 65532:65532
EXPOSE 8080 8081
ENTRYPOINT ["k8s-consul-registrar"]
