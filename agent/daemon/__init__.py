"""The privileged side: network, keys and state. Never loads numpy, cv2 or an inference runtime."""
