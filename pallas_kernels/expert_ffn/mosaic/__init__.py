"""Building blocks of kernels over pages: decoding, multiplying, streaming."""
