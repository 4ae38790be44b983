// What a run is doing, as a value: messages of the server in, the next state out.

export const IDLE = Object.freeze({ running: false, tasks: [], share: 0 });

/** The state after a progress message (`Activity` in nodes/host/progress.py). */
export function advance(state, message) {
  const fresh = !state.running || state.promptId !== message.prompt_id;
  const { stage, task, tasks, prompt, prompts, step, steps, share, round, rounds } = message;
  const names = tasks?.length ? tasks : fresh ? [] : state.tasks;
  const previews = fresh ? {} : state.previews;
  const place = { stage, task, tasks: names, prompt, prompts, step, steps, share, round, rounds };
  return { running: true, promptId: message.prompt_id, ...place, previews };
}

/** The state with the picture of the LoRA at work; what it replaces is for the caller to release. */
export function withPreview(state, url) {
  if (!state.running || state.stage !== "calibrate") return { state, replaced: url };
  const replaced = state.previews[state.task];
  return { state: { ...state, previews: { ...state.previews, [state.task]: url } }, replaced };
}

/** Every picture of a state, to be released. */
export const previewsOf = (state) => Object.values(state.previews ?? {});

/** waiting, running or done, for each LoRA. */
export function taskStates(state) {
  return state.tasks.map((_, i) => {
    if (state.stage === "solve" || i < state.task) return "done";
    return state.stage === "calibrate" && i === state.task ? "running" : "waiting";
  });
}
