"""Other trainers' protocols, as far as they score: vLLM's and SGLang's requests, answered by the same service.

A trainer that asks a vLLM or SGLang server for the log-probabilities of a prompt asks this teacher instead by changing
a URL. `bodies` and `prompts` read what the protocols share, `vllm_completions`, `vllm_generate` and `sglang` one
request and its answer each, `scoring` takes them through the service, `routes` puts them on the HTTP listener.
"""
