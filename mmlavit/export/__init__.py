"""Trained models as ONNX files and as ``.pt2`` programs of torch.export.

Needs a torch with ``torch.compiler.is_exporting`` (2.11 was tried) and
``pip install 'mmlavit[export]'``.
"""
