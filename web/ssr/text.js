// Words of the panel in the user's language.

const count = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;

const EN = {
  loras: "LoRAs", result: "Result", layers: "Layers", advice: "What next",
  idle: "Run the graph to see how the LoRAs are kept apart.",
  noLoras: "No SSR LoRA is connected.", ofCalibration: "No SSR LoRA is connected: the calibration's own LoRAs are merged.",
  loading: "Reading the LoRAs", solving: "Solving",
  calibrating: (s) => `${s.name} (${s.task + 1} of ${s.tasks.length}), prompt ${s.prompt + 1} of ${s.prompts}, step ${s.step} of ${s.steps}`
    + (s.rounds > 1 ? `, round ${s.round + 1} of ${s.rounds}` : ""),
  stopped: "Stopped.", failed: "The node stopped with an error.", finished: "Finished.", restored: "From the last run.",
  before: "Plain sum", after: "This merge",
  cell: (i, j, v) => `${j} under the prompt of ${i}: ${v}`,
  ideal: "Ideal: 1 on the diagonal, 0 off it.",
  matrix: "Crosstalk: energy of each LoRA's branch under each LoRA's prompt",
  noMatrix: "No crosstalk to show: no layer has statistics of all LoRAs.",
  unmeasured: "Nothing was measured: there is no calibration of these LoRAs. Layers lists what was done in each layer.",
  error: "Error", errorOn: { calibration: "calibration tokens", held_out: "held-out tokens" },
  routers: { result: "this merge", sum: "plain sum", average: "average", gains: "best gains" },
  search: "Search layers", byModel: "in model order", byError: "largest error first",
  order: "Order", noLayers: "No layer has this name.", notMerged: "Nothing is merged here yet: connect CALIBRATION to SSR Solve.",
  calibratedNext: "Connect CALIBRATION to SSR Solve or SSR Compare, or to SSR Report for a forecast.",
  more: (n) => `${n} more: narrow the search.`,
  omitted: (n) => `Not sent: ${count(n, "layer")} with smaller errors.`, matrixOmitted: "Too many layers to send each one's crosstalk.",
  status: { routed: "routed", merged: "merged", passed_through: "passed through", anchored: "by the anchor" },
  fields: { status: "status", rank: "rank", tokens: "tokens", condition: "condition", nonfinite: "non-finite tokens", part: "part", tasks: "LoRAs", errors: "error",
    held_errors: "held-out error", task_errors: "error by LoRA", held_task_errors: "held-out error by LoRA", held_tokens: "held-out tokens" },
  nothing: "Nothing: use the merge.", notes: "Notes", files: "Files", keys: (n) => count(n, "key"),
  add: "Add LoRA", close: "Close the list", find: "Search LoRAs", noFile: "No LoRA has this name.",
  enabled: (n) => `${n}: enabled`, strength: (n) => `${n}: strength`,
  up: (n) => `${n}: move up`, down: (n) => `${n}: move down`, remove: (n) => `${n}: remove`, open: (n) => `${n}: show its node`,
  other: (n) => `from ${n}`,
  triggers: "Trigger words", noTriggers: "This file names no trigger words.", choose: "Choose a LoRA to see its trigger words.",
  noAnswer: "The file's trigger words could not be read.",
  insert: (w) => `Add to the prompt: ${w}`, seen: (n) => count(n, "caption"),
  calibrated: (t) => `${count(t.layers, "layer")}, ${count(t.tokens, "token")} at most` + (t.unseen ? `, ${t.unseen} never ran` : ""),
  shared: (n) => `${count(n, "layer is", "layers are")} shared by two or more LoRAs.`,
};

const ZH = {
  loras: "LoRA", result: "结果", layers: "层", advice: "下一步",
  idle: "运行工作流后，这里会显示各 LoRA 的分离情况。",
  noLoras: "没有连接 SSR LoRA。", ofCalibration: "没有连接 SSR LoRA：合并的是校准中的 LoRA。",
  loading: "正在读取 LoRA", solving: "正在求解",
  calibrating: (s) => `${s.name}（${s.task + 1}/${s.tasks.length}），提示词 ${s.prompt + 1}/${s.prompts}，步 ${s.step}/${s.steps}`
    + (s.rounds > 1 ? `，第 ${s.round + 1}/${s.rounds} 轮` : ""),
  stopped: "已停止。", failed: "节点出错停止。", finished: "已完成。", restored: "来自上一次运行。",
  before: "直接相加", after: "本次合并",
  cell: (i, j, v) => `在 ${i} 的提示词下 ${j} 的能量：${v}`,
  ideal: "理想情况：对角线为 1，其余为 0。",
  matrix: "串扰：每个 LoRA 的分支在每个 LoRA 的提示词下的能量",
  noMatrix: "没有可显示的串扰：没有任何层具有全部 LoRA 的统计量。",
  unmeasured: "没有测量：没有这些 LoRA 的校准。“层”中列出每一层做了什么。",
  error: "误差", errorOn: { calibration: "校准 token", held_out: "留出 token" },
  routers: { result: "本次合并", sum: "直接相加", average: "平均", gains: "最佳增益" },
  search: "搜索层", byModel: "按模型顺序", byError: "误差大者在前",
  order: "排序", noLayers: "没有同名的层。", notMerged: "这里还没有合并：请把 CALIBRATION 接到 SSR Solve。",
  calibratedNext: "把 CALIBRATION 接到 SSR Solve 或 SSR Compare；接到 SSR Report 可先看预测。",
  more: (n) => `还有 ${n} 个：请缩小搜索范围。`,
  omitted: (n) => `另有 ${n} 个误差较小的层未发送。`, matrixOmitted: "层数太多，未发送每一层的串扰。",
  status: { routed: "已路由", merged: "已合并", passed_through: "原样通过", anchored: "按锚点" },
  fields: { status: "状态", rank: "秩", tokens: "token 数", condition: "条件数", nonfinite: "非有限 token", part: "部分", tasks: "LoRA", errors: "误差",
    held_errors: "留出误差", task_errors: "各 LoRA 的误差", held_task_errors: "各 LoRA 的留出误差", held_tokens: "留出 token" },
  nothing: "无：直接使用合并结果即可。", notes: "说明", files: "文件", keys: (n) => `${n} 个键`,
  add: "添加 LoRA", close: "关闭列表", find: "搜索 LoRA", noFile: "没有同名的 LoRA。",
  enabled: (n) => `${n}：启用`, strength: (n) => `${n}：强度`,
  up: (n) => `${n}：上移`, down: (n) => `${n}：下移`, remove: (n) => `${n}：移除`, open: (n) => `${n}：定位节点`,
  other: (n) => `来自 ${n}`,
  triggers: "触发词", noTriggers: "该文件没有写明触发词。", choose: "选择一个 LoRA 以查看其触发词。",
  noAnswer: "无法读取该文件的触发词。",
  insert: (w) => `加入提示词：${w}`, seen: (n) => `${n} 条标注`,
  calibrated: (t) => `${t.layers} 层，最多 ${t.tokens} 个 token` + (t.unseen ? `，${t.unseen} 层未运行` : ""),
  shared: (n) => `${n} 层由两个或更多 LoRA 共有。`,
};

export const WORDS = { en: EN, zh: ZH };

/** The words for a locale such as "zh" or "en-GB"; English where there are none. */
export const wordsFor = (locale) => WORDS[String(locale ?? "en").split("-")[0]] ?? EN;
