"""SGLang servers over HTTP: requests, replies, the pool of servers, and the transfer of weights."""
