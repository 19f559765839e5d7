"""The engine behind the API that other tools speak: requests and replies, the engine's thread, HTTP."""
