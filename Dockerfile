# The daemon and the CLI, and nothing else.
#
#   docker build -t lamina .                                              CPU only
#   docker build -t lamina --build-arg BUILD_IMAGE=<CUDA devel image on Debian 12> \
#                          --build-arg BASE_IMAGE=<CUDA runtime image on Debian 12> --build-arg CUDA=ON .
#
# Both images must be Debian 12 or carry its libraries; the runtime one needs libcublasLt.so.13 for CUDA.
ARG BASE_IMAGE=debian:12-slim
ARG BUILD_IMAGE=debian:12

FROM ${BUILD_IMAGE} AS build
ARG CUDA=OFF
WORKDIR /src
COPY scripts/setup scripts/setup
RUN scripts/setup
COPY . .
RUN LAMINA_CUDA=${CUDA} LAMINA_TESTS=OFF scripts/build release laminad lamina_cli && \
    scripts/bundle-libraries build/release/bin/laminad build/release/bin/lamina /opt/lamina/lib && \
    install -D -t /opt/lamina/bin build/release/bin/laminad build/release/bin/lamina

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="laminad" \
      org.opencontainers.image.description="Owns a transformer layer stack on one device and serves it over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/lamina /opt/lamina
ENV LD_LIBRARY_PATH=/opt/lamina/lib \
    PATH=/opt/lamina/bin:$PATH \
    LAMINA_LISTEN=unix:/run/lamina/laminad.sock \
    LAMINA_METRICS=0.0.0.0:9464 \
    LAMINA_CHECKPOINTS=/var/lib/lamina \
    LAMINA_TARGET=unix:/run/lamina/laminad.sock
RUN mkdir -p /run/lamina /var/lib/lamina && chown 65532:65532 /run/lamina /var/lib/lamina && \
    chmod 0700 /run/lamina /var/lib/lamina
USER 65532:65532
VOLUME /var/lib/lamina
EXPOSE 9464
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s CMD ["/opt/lamina/bin/lamina", "health"]
ENTRYPOINT ["/opt/lamina/bin/laminad"]
