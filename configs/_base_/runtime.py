"""What every LaViT config adds to the default_runtime of its toolbox."""
custom_imports = dict(imports=['mmlavit'], allow_failed_imports=False)
custom_hooks = [dict(type='InvalidLossHook')]
