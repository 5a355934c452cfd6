"""The OpenAI-compatible server: engines on threads of their own, behind FastAPI on loopback.

engine_thread  one engine on a thread, and what comes out of one request
service        one model to be asked by many: an engine thread, a tokenizer, a queue; new weights while it runs
vocabulary     what single tokens stand for; output that follows a grammar: JSON, tool calls
errors         what a request must pass: host, key, size; refusals in OpenAI's shape
bodies         what requests may say
answers        what every route needs; how completions and chat are answered whole or as they come
completions    /v1/completions
chat           /v1/chat/completions
routes         those that draw nothing: /health, /metrics, /v1/models, /admin/weights, /tokenize, /v1/embeddings ...
page           the chat page, and what its readers save
server         all of it as one application on a port, until a signal; one client's connection
"""
