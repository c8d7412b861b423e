"""HTML with every text in both languages; the page shows one of them."""

from html import escape

# English texts of the page, and their translations
_CHINESE = {
    "running": "训练中",
    "complete": "已完成",
    "stopped and saved": "已停止并保存",
    "stopped early": "提前停止",
    "failed": "出错",
    "step": "步",
    "loss, mean of the last 10%": "loss（最后 10% 的均值）",
    "loss of the first step": "第一步的 loss",
    "lowest validation loss": "最低验证 loss",
    "tokens per second": "每秒 token 数",
    "tokens trained on": "已训练 token 数",
    "peak memory": "显存/内存峰值",
    "predicted": "预测",
    "measured": "实测",
    "Loss": "Loss",
    "loss of a step": "每步 loss",
    "moving mean": "滑动平均",
    "validation loss": "验证 loss",
    "Throughput": "吞吐",
    "Memory per device": "每个设备的内存",
    "Learning rate": "学习率",
    "Gradient norm": "梯度范数",
    "available": "可用",
    "weights": "权重",
    "gradients": "梯度",
    "optimizer": "优化器",
    "activations": "激活",
    "logits": "logits",
    "workspace": "临时空间",
    "heap": "堆碎片",
    "process": "进程",
    "other": "其他",
    "forward": "前向",
    "backward": "反向",
    "phase": "阶段",
    "Samples": "生成样例",
    "before training": "训练前",
    "prompt": "提示",
    "in the data": "数据中的原文",
    "greedy, always with the most likely token": "贪心解码，总取概率最大的 token",
    "the model writes nothing": "模型没有输出",
    "Data": "数据",
    "documents": "文档数",
    "tokens": "token 数",
    "validation tokens": "验证集 token 数",
    "tokenizer": "分词器",
    "source": "来源",
    "Examples as the model sees them": "模型看到的样例",
    "contributes to the loss": "计入 loss",
    "context only": "仅作上下文",
    "end of document": "文档结束",
    "Reproduce": "复现",
    "The command that repeats this run": "重复这次训练的命令",
    "copy": "复制",
    "copied": "已复制",
    "Manifest": "运行清单",
    "model": "模型",
    "parameters": "参数",
    "trained": "可训练",
    "precision": "精度",
    "seed": "随机种子",
    "base": "基础模型",
    "code": "代码版本",
    "versions": "软件版本",
    "data (SHA-256)": "数据 (SHA-256)",
    "all of run.json": "run.json 全文",
    "updated": "更新于",
    "This page is one file: it loads nothing and works offline.": "本页是单个文件，不加载任何外部内容，可离线打开。",
    "The page is not being updated any more: the process has probably ended.": "页面已不再更新：训练进程可能已经结束。",
    "no step yet": "尚未完成第一步",
    "nats per token": "nat/token",
    "nats per pair": "nat/对",
    "training": "训练",
    "validation": "验证",
    "Reward margin": "奖励差值（chosen − rejected）",
    "Accuracy": "准确率",
    "share of pairs with a positive margin": "奖励差值为正的比例",
    "accuracy, mean of the last 10%": "准确率（最后 10% 的均值）",
}


def both(english: str, chinese: str | None = None) -> str:
    """A text in both languages, escaped. The translation of a known text need not be given."""
    chinese = _CHINESE[english] if chinese is None else chinese
    if chinese == english:
        return escape(english)
    return f'<span class="en" lang="en">{escape(english)}</span><span class="zh" lang="zh">{escape(chinese)}</span>'


def pair(english: str) -> list[str]:
    """A known text in both languages, for scripts."""
    return [english, _CHINESE[english]]
