"""The OpenAI-compatible server: engines on threads of their own, behind FastAPI on loopback.

service      one model, one engine, one thread
stream       what comes out of one request
weights      new weights for a network that runs
pieces       what single tokens stand for
errors       refusals in OpenAI's shape
limits       host, key, size: what a request must pass
access       what every route needs
bodies       what requests may say; sampling: how that becomes parameters of the engine
completions  /v1/completions
chat         /v1/chat/completions: chat_bodies, chat_stream, tools, constraints
embeddings   /v1/embeddings
tokens       /tokenize, /detokenize, /tokenizer_info
admin        /health, /version, /metrics, /v1/models, /admin/weights
page         the chat page; feedback: what its readers save
metrics      what /metrics says
app          all of it as one application
server       the application on a port, until a signal
"""
