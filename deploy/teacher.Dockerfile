# The teacher with vLLM, on NVIDIA GPUs. `docker compose build teacher`, or from the repository's root:
#
#   docker build --file deploy/teacher.Dockerfile --tag vopd-teacher .
#
# Its base is vLLM's own image: Python, torch, CUDA and the compilers that vLLM calls at run time.
# deploy/vllm-env.sh names the same version.
FROM vllm/vllm-openai:v0.32.0

LABEL org.opencontainers.image.title="vopd teacher" \
      org.opencontainers.image.licenses="Apache-2.0"

# Compiled here: at run time the file system is read-only, and not the user's.
ENV UV_COMPILE_BYTECODE=1
WORKDIR /opt/vopd

# What the server needs beside vLLM. What is there already stays at its version, or the build fails.
COPY pyproject.toml ./
RUN uv pip list --system --format=freeze > /tmp/installed.txt \
    && uv pip install --system --break-system-packages --no-cache --constraint /tmp/installed.txt \
       --requirement pyproject.toml --extra server \
    && rm /tmp/installed.txt

# vLLM's image has a user 2000; one without an entry in /etc/passwd would fail in torch. The user owns nothing but
# /keys, for API keys, and /cache, which is where every library that keeps things in a home directory finds it.
RUN (getent passwd 2000 || useradd --uid 2000 --gid 0 --no-create-home --home-dir /cache vllm) \
    && install --directory --owner=2000 --group=0 /cache /keys

COPY LICENSE README.md ./
COPY client client
COPY proto proto
COPY server server
COPY settings settings
RUN uv pip install --system --break-system-packages --no-cache --no-deps . \
    && vopd-server --version

ENV HOME=/cache \
    XDG_CACHE_HOME=/cache \
    XDG_CONFIG_HOME=/cache/config \
    HF_HOME=/cache/huggingface \
    VLLM_CACHE_ROOT=/cache/vllm \
    VLLM_CONFIG_ROOT=/cache/config/vllm \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    VLLM_NO_USAGE_STATS=1
VOLUME /cache /keys
USER 2000:0
EXPOSE 50051 8080 9090
ENTRYPOINT ["vopd-server"]
CMD ["serve", "--help"]
