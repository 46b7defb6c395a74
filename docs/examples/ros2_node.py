"""A ROS 2 node that asks a running edge-llm server: a `std_msgs/String` in, one out.

Listens on `prompt`, and publishes each answer whole on `answer` and, while it is written, piece by
piece on `answer_piece`. A new prompt stops the answer before it. Needs only rclpy and the standard
library, so it runs in the Python of ROS 2, beside the server's own environment:

    python3 ros2_node.py --ros-args -p url:=http://127.0.0.1:8000 -p max_tokens:=512
    ros2 topic pub --once /prompt std_msgs/msg/String "{data: 'Which way is north?'}"
"""

import http.client
import json
import queue
import threading
import urllib.error
import urllib.request

import rclpy
from rclpy.node import Node
from std_msgs.msg import String


class EdgeLLMNode(Node):
    def __init__(self):
        super().__init__("edge_llm")
        self.url = self.declare_parameter("url", "http://127.0.0.1:8000").value
        self.model = self.declare_parameter("model", "").value  # empty: the server's default
        self.api_key = self.declare_parameter("api_key", "").value
        self.system = self.declare_parameter("system", "You are a robot. Be brief.").value
        self.max_tokens = self.declare_parameter("max_tokens", 512).value
        self.answers = self.create_publisher(String, "answer", 10)
        self.pieces = self.create_publisher(String, "answer_piece", 100)
        self.prompts = queue.Queue()
        self.create_subscription(
            String, "prompt", lambda message: self.prompts.put(message.data), 10
        )
        # The executor's thread must not wait for an answer, so another one does.
        threading.Thread(target=self.work, daemon=True).start()

    def work(self):
        while True:
            prompt = self.prompts.get()
            while not self.prompts.empty():  # only the newest counts
                prompt = self.prompts.get()
            try:
                answer = "".join(self.stream(prompt))
            except urllib.error.HTTPError as error:  # refused; the body says why
                self.get_logger().error(f"{self.url}: {error}: {error.read().decode()}")
                continue
            except (OSError, http.client.HTTPException, ValueError) as error:
                # No server, a timeout, an error in the middle or an end there.
                self.get_logger().error(f"{self.url}: {error}")
                continue
            if self.prompts.empty():
                self.answers.publish(String(data=answer))

    def stream(self, prompt):
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": prompt}]
        body = {"messages": messages, "max_tokens": self.max_tokens, "stream": True}
        if self.model:
            body["model"] = self.model
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.api_key}"}
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            for line in response:
                if not self.prompts.empty():
                    return  # a closed connection ends the answer on the server, too
                if line.startswith(b"data: [DONE]"):
                    return
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
                if piece:
                    self.pieces.publish(String(data=piece))
                    yield piece
        raise ValueError("the answer broke off")


def main():
    rclpy.init()
    node = EdgeLLMNode()
    try:
        rclpy.spin(node)
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
