"""A trained model in the browser and over HTTP: batching, service, payload, app, and the page itself."""
