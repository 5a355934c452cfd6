"""The OpenAI-compatible server: engines on threads of their own, behind FastAPI on loopback.

engine_thread  one engine on a thread
stream         what comes out of one request
service        one model to be asked by many: an engine thread, a tokenizer, a queue
weights        new weights for a network that runs
pieces         what single tokens stand for
constraints    output that follows a grammar: JSON, tool calls
errors         refusals in OpenAI's shape
limits         host, key, size: what a request must pass
access         what every route needs
bodies         what requests may say
sampling       how tokens are drawn: what requests say of it, and how that becomes parameters of the engine
answers        how completions and chat are asked of the engine, and answered whole or as they come
completions    /v1/completions
chat           /v1/chat/completions: chat_bodies, chat_answer
embeddings     /v1/embeddings
tokens         /tokenize, /detokenize, /tokenizer_info
admin          /health, /version, /metrics, /v1/models, /admin/weights
page           the chat page; feedback: what its readers save
metrics        what /metrics says
app            all of it as one application
server         the application on a port, until a signal
connection     one client's connection
"""
