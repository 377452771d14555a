"""kvmarket for stock vLLM: an external KV connector, plugged in by configuration alone.

--kv-transfer-config '{"kv_connector":"KVMarketConnector",
                       "kv_connector_module_path":"kvmarket_vllm.connector","kv_role":"kv_both"}'
"""
