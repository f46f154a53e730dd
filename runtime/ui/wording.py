"""Every word of the page, English and Chinese."""

ENGLISH = {
    "ask": "Ask, and add pictures", "ask_text": "Ask something", "settings": "How to answer", "system": "System prompt",
    "system_info": "What the model should keep to, in every answer", "released": "Sample as the model was released",
    "released_info": "Untick to use the values below", "temperature": "Temperature",
    "temperature_info": "0 always takes the most likely token", "top_p": "Top p",
    "top_p_info": "The smallest set of tokens of this probability", "top_k": "Top k",
    "top_k_info": "The most likely tokens; 0 takes all", "repetition_penalty": "Repetition penalty",
    "repetition_penalty_info": "Above 1 discourages tokens already seen", "max_tokens": "Longest answer",
    "max_tokens_info": "In tokens"}
CHINESE = {
    "ask": "输入问题，可添加图片", "ask_text": "输入问题", "settings": "回答设置", "system": "系统提示词",
    "system_info": "模型在每个回答中都应遵守的要求", "released": "按模型发布时的方式采样",
    "released_info": "取消勾选后使用下面的数值", "temperature": "温度", "temperature_info": "0 表示总取概率最高的词元",
    "top_p": "Top p", "top_p_info": "累计概率达到此值的最小词元集合", "top_k": "Top k",
    "top_k_info": "概率最高的若干词元；0 表示全部", "repetition_penalty": "重复惩罚",
    "repetition_penalty_info": "大于 1 时避免重复已出现的词元", "max_tokens": "最长回答", "max_tokens_info": "以词元计"}
