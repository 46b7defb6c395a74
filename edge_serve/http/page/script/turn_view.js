// Shows one turn, with what can be done with it.

import { MarkdownView } from "./answer/markdown_view.js";
import { siblingsOf } from "./conversation.js";
import { copyFrom } from "./copy.js";
import { isComposing, node } from "./dom.js";
import { fileList } from "./files.js";
import { factsOf, thinkingTime } from "./figures.js";
import { count, t } from "./words.js";

export class TurnView {
  /**
   * Args: the conversation, the turn, and what to do: `regenerate(turn)`, `go_on(turn)`,
   * `edit(turn, text)`, which returns whether it was sent, and `show(turn, name)`, by the button of that name.
   */
  constructor(conversation, turn, actions) {
    this.conversation = conversation;
    this.turn = turn;
    this.actions = actions;
    this.root = node("div", `turn ${turn.role}`);
    this.root.setAttribute("role", "group");
    this.root.setAttribute("aria-label", t(turn.role === "user" ? "you" : "model"));
    this.body = node("div", "body");
    this.facts = node("div", "facts");
    if (turn.role === "assistant") this.#makeReasoning();
    this.root.append(this.body, this.facts);
    if (this.details) this.answer = new MarkdownView(this.body);
    this.update(true);
  }

  #makeReasoning() {
    this.details = node("details");
    this.summary = node("summary");
    const reasoning = node("div", "reasoning");
    reasoning.tabIndex = 0;
    this.details.append(this.summary, reasoning);
    this.details.hidden = true;
    this.thought = new MarkdownView(reasoning);
    this.details.addEventListener("toggle", () => this.#showReasoning(this.isFinal));
    this.root.append(this.details);
  }

  /** Shows the turn as it is now; `final` once nothing more is added to it. */
  update(final) {
    if (this.root.classList.contains("editing")) return;
    this.isFinal = final;
    const { turn } = this;
    if (turn.role === "assistant") this.#showName();
    if (!this.answer) {
      this.#showFiles();
      this.body.hidden = !turn.content;
      if (this.body.textContent !== turn.content || this.body.firstElementChild) this.body.textContent = turn.content;
    } else {
      if (turn.content || final) this.answer.update(turn.content, final);
      this.#showReasoning(final);
      this.#followPhase(final);
    }
    if (final) this.#showFacts();
  }

  #showFiles() {
    const { files } = this.turn;
    if (files === this.shownFiles) return;
    this.shownFiles = files;
    this.files?.remove();
    if (!files) return;
    this.files = fileList(files);
    this.root.prepend(this.files);
  }

  // Of two side by side, each says whose it is.
  #showName() {
    if (!this.#isInPair) { this.name?.remove(); return; }
    this.name ??= node("h2");
    this.name.textContent = this.turn.model;
    if (this.name.parentNode !== this.root) this.root.prepend(this.name);
  }

  /** Makes ready for an answer that comes, or goes on. */
  begin() {
    this.facts.replaceChildren();
    this.update(false);
  }

  /** Says why there is nothing yet; `share` of what it waits for is done. */
  wait(text, share) {
    if (!this.waiting) {
      this.waiting = node("div", "waiting");
      this.waiting.append(node("span"), node("progress"));
      this.waiting.lastChild.max = 1;
      this.waiting.lastChild.setAttribute("aria-hidden", "true");  // the text says it
    }
    this.waiting.firstChild.textContent = text;
    this.waiting.lastChild.hidden = share === undefined;
    if (share !== undefined) this.waiting.lastChild.value = share;
    if (this.waiting.parentNode !== this.root) this.root.insertBefore(this.waiting, this.facts);
  }

  #showReasoning(final) {
    const { turn } = this;
    if (!turn.reasoning) return;
    this.details.hidden = false;
    this.summary.textContent = this.#summary(final);
    if (this.details.open) this.thought.update(turn.reasoning, final || turn.content !== "");
  }

  #summary(final) {
    const { figures = {}, thought_ms: took, content } = this.turn;
    if (!final && !content) return t("thinking");
    const time = took === undefined ? "" : thinkingTime(took);
    const tokens = figures.reasoning_tokens;
    if (time && tokens) return t("thought_long", { time, n: count(tokens) });
    return time ? t("thought", { time }) : t("reasoning");
  }

  // Open while it reasons, folded once it answers; in between the reader may do as they like.
  #followPhase(final) {
    const { turn } = this;
    const phase = turn.content ? "answer" : turn.reasoning ? "reasoning" : "";
    if (final || phase) this.waiting?.remove();
    if (phase !== this.phase) this.details.open = phase === "reasoning" && (!final || !turn.content);
    this.phase = phase;
  }

  get #isInPair() { return this.conversation.pair?.includes(this.turn.id) ?? false; }

  #showFacts() {
    const { turn } = this;
    const facts = turn.role === "assistant" ? factsOf(turn, this.#isInPair) : [];
    this.facts.replaceChildren(...facts.map((fact) => node("span", "", fact)));
    const tools = node("div", "tools");
    if (this.#isInPair) {
      const keep = this.#button("keep", () => this.actions.show(turn, "keep"));
      keep.className = "keep";
      keep.disabled = document.body.classList.contains("answering");
      tools.append(keep);
    } else tools.append(...this.#branches());
    if (turn.content) tools.append(this.#button("copy", (button) => copyFrom(button, () => turn.content)));
    if (turn.role === "user") tools.append(this.#button("edit", () => this.#edit()));
    else if (!this.#isInPair) {
      tools.append(this.#button("regenerate", () => this.actions.regenerate(turn)));
      // What follows an answer followed it as it is.
      const isLast = turn.id === this.conversation.leaf;
      if (isLast && turn.ended !== "stop") tools.append(this.#button("continue", () => this.actions.go_on(turn)));
    }
    this.facts.append(tools);
  }

  #button(name, act) {
    const button = node("button", `quiet ${name}`, t(name));
    button.type = "button";
    button.addEventListener("click", () => act(button));
    return button;
  }

  #branches() {
    const siblings = siblingsOf(this.conversation, this.turn);
    if (siblings.length < 2) return [];
    const at = siblings.indexOf(this.turn);
    const step = (name, sign, to) => {
      const button = this.#button(name, () => this.actions.show(siblings[to], name));
      button.textContent = sign;
      button.setAttribute("aria-label", t(name));
      button.disabled = !siblings[to];
      return button;
    };
    const place = node("span", "place", `${at + 1}/${siblings.length}`);
    return [step("previous", "‹", at - 1), place, step("next", "›", at + 1)];
  }

  #edit() {
    const area = node("textarea");
    area.value = this.turn.content;
    area.setAttribute("aria-label", t("edit_message"));
    area.rows = Math.min(12, area.value.split("\n").length + 1);
    const stop = () => { this.root.classList.remove("editing"); this.update(true); };
    const send = () => { if ((area.value.trim() || this.turn.files) && this.actions.edit(this.turn, area.value.trim())) stop(); };
    const buttons = node("div", "tools");
    const main = this.#button("send", send);
    main.className = "main";
    buttons.append(main, this.#button("cancel", stop));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !isComposing(event)) { event.stopPropagation(); stop(); }
      if (event.key === "Enter" && !event.shiftKey && !isComposing(event)) { event.preventDefault(); send(); }
    });
    this.root.classList.add("editing");
    this.body.hidden = false;
    this.body.replaceChildren(area);
    this.facts.replaceChildren(buttons);
    area.focus();
  }
}
