"""Built-in texts, used when --calib is not given: the activations of a general chat model are
measured on CALIBRATION, the result is judged on HELD_OUT. Written for this toolkit; half Chinese,
half English; questions, prose, lists, numbers and code.
"""

CALIBRATION = (
    "请用三句话说明为什么天空在傍晚会变红。",
    "一列火车每小时行驶一百二十公里，两个半小时能走多远？请写出计算过程。",
    "春天来了，山坡上的杏花先开，接着是桃花和梨花。村里的孩子放学后不急着回家，沿着小河边走边看。",
    "把下面的句子翻译成英文：明天上午九点我们在图书馆门口见面，请带上你的笔记本。",
    "列出一次周末徒步旅行需要准备的十样东西，并说明每样东西的用途。",
    "什么是数据库事务？它的四个基本性质分别解决什么问题？",
    "给一家新开的面馆写一段五十字左右的介绍，语气亲切一些。",
    "会议纪要：一、上季度销售额比去年同期增长百分之八；二、华东仓库下月十五日搬迁；三、客服系统改为两班制。",
    "有人说读书不如实践，你怎么看？请从两个方面谈谈。",
    "写一个函数，输入一个整数列表，返回其中出现次数最多的数；如果有多个，返回最小的一个。",
    "我最近总是睡不好，晚上躺下以后脑子停不下来，有什么简单的办法可以试一试？",
    "解释一下“守株待兔”的意思，并用它造一个句子。",
    "Explain in two or three sentences why ice floats on water.",
    "A shop sells pencils at 0.45 each and notebooks at 2.30 each. How much do six pencils and four notebooks cost?",
    "The harbour was quiet that morning. Two fishing boats had come back before dawn, and their crews were already asleep.",
    "Translate into Chinese: The meeting has been moved to Thursday at half past three because the manager is travelling.",
    "Give me a packing list for a week in a cold city, grouped by clothes, documents and electronics.",
    "What is the difference between a process and a thread, and when would you choose one over the other?",
    "Write a short and polite email asking a supplier why an order that was due on 12 May has not arrived.",
    "def moving_average(values, width):\n    total = sum(values[:width])\n    result = [total / width]\n    for old, new in "
    "zip(values, values[width:]):\n        total += new - old\n        result.append(total / width)\n    return result",
    "Summarise the main arguments for and against working from home, in no more than five bullet points.",
    "Who was the first person to walk on the Moon, and in which year did it happen?",
    "My basil plant keeps losing its leaves although I water it every day. What am I doing wrong?",
    "Table: January 31 days, February 28 or 29 days, March 31 days, April 30 days. Which of these months is the longest?",
)

HELD_OUT = (
    "用一句话介绍一下你自己，然后说说你能帮我做什么。",
    "小明有五个苹果，送给妹妹两个，又买了三个，现在他有几个苹果？",
    "雨下了一整夜，早上起来院子里积了水，树叶落了一地，空气却格外清新。",
    "为什么冬天湖面结冰的时候，湖底的水还是液态的？",
    "Name three renewable sources of energy and one drawback of each.",
    "The old clock on the wall stopped at ten past four, and nobody in the family ever wound it again.",
    "Write a haiku about the sea in autumn.",
    "What does the following line print? print([n * n for n in range(5) if n % 2])",
)
