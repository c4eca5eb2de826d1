"""What an inference engine does with MLA's weights, stock and with the plugin, and how far each is from fp32."""
