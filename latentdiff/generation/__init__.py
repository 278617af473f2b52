"""One call of the pipeline, in order: request, inputs, text, guided network, sampling, decoding, result."""
