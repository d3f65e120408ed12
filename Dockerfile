# SPDX-License-Identifier: Apache-2.0
# The driver's image: `orlop` in a virtual environment, and the tools that its backends run. amd64 and arm64.
#
#   docker build -t orlop .      or      buildah bud -t orlop .

FROM debian:12.12-slim AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# The dependencies first: they change rarely, and their layer is kept while only the driver changes.
COPY pyproject.toml ./
RUN python3 -m venv /opt/orlop \
 && python3 -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
print(*p["project"]["dependencies"], sep="\n")' > requirements.txt \
 && /opt/orlop/bin/pip install --no-cache-dir -r requirements.txt
COPY LICENSE README.md* ./
COPY csi_driver csi_driver
# pip itself stays behind: a running driver installs nothing.
RUN /opt/orlop/bin/pip install --no-cache-dir --no-deps . \
 && /opt/orlop/bin/pip uninstall --yes pip setuptools

FROM debian:12.12-slim
# mkfs, resize and check programs of the filesystems a volume may have, what mounts NFS, and a first process that reaps what
# the driver's children leave behind; nothing to fetch or to build with.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 e2fsprogs xfsprogs btrfs-progs util-linux nfs-common tini \
 && rm -rf /var/lib/apt/lists/* /var/cache/debconf /usr/share/doc /usr/share/man
COPY --from=build /opt/orlop /opt/orlop
ENV PATH=/opt/orlop/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# Root: the driver mounts and makes loop devices. The pod's security context says what else it may.
HEALTHCHECK --interval=30s --timeout=3s --start-period=5s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9808/healthz', timeout=2)"]
ENTRYPOINT ["tini", "--", "orlop"]
# The health check asks there.
CMD ["serve", "--http=127.0.0.1:9808"]
# Last, so that another version keeps the layers above.
ARG VERSION=dev
LABEL org.opencontainers.image.title="Orlop" \
      org.opencontainers.image.description="A Kubernetes CSI driver for the storage a cluster already has" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
