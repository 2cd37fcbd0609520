# The daemon and the CLI, and nothing else.
#
#   scripts/build-image                                                   without a registry, from Debian's packages
#   docker build -t lamina .                                              CPU only
#   docker build -t lamina --build-arg CUDA=ON --build-arg CUDA_FROM=pypi .
#                                                                         CUDA, the toolkit from NVIDIA's wheels; or
#   docker build -t lamina --build-arg CUDA=ON --build-arg BUILD_IMAGE=<CUDA devel image on Debian 12> .
#
# Both images must be Debian 12 or carry its libraries; the base needs libc, libstdc++ and libgcc, no shell and no CUDA.
ARG BASE_IMAGE=debian:12-slim
ARG BUILD_IMAGE=debian:12

FROM ${BUILD_IMAGE} AS build
ARG CUDA=OFF
ARG CUDA_FROM=
ARG REVISION=
WORKDIR /src
COPY scripts/setup scripts/setup
RUN scripts/setup image
COPY . .
RUN LAMINA_CUDA=${CUDA} LAMINA_CUDA_FROM=${CUDA_FROM} LAMINA_TESTS=OFF LAMINA_COMMIT=${REVISION} \
        scripts/build release laminad lamina_cli && \
    scripts/image-root build/release/bin /image

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="lamina" \
      org.opencontainers.image.description="Owns transformer layer stacks on one device and serves them over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.documentation="docs/deploy.md"
COPY --from=build /image/opt/ /opt/
# What is written to: the sockets' folder and the checkpoints'. A read-only root needs volumes there.
COPY --from=build --chown=65532:65532 /image/run/ /run/
COPY --from=build --chown=65532:65532 /image/varlib/ /var/lib/
ENV LD_LIBRARY_PATH=/opt/lamina/lib \
    PATH=/opt/lamina/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    LAMINA_LISTEN=unix:/run/lamina/laminad.sock \
    LAMINA_METRICS=0.0.0.0:9464 \
    LAMINA_CHECKPOINTS=/var/lib/lamina \
    LAMINA_TARGET=unix:/run/lamina/laminad.sock \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
VOLUME /var/lib/lamina
EXPOSE 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["/opt/lamina/bin/lamina", "health"]
ENTRYPOINT ["/opt/lamina/bin/tini", "--", "/opt/lamina/bin/laminad"]
