"""What every part of mmlavit may use; it uses none of them."""
