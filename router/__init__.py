"""The router: text to a calibrated decision about who should answer."""
