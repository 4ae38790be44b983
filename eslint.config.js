import js from "@eslint/js";
import globals from "globals";

const strict = {
  ...js.configs.recommended.rules,
  eqeqeq: "error",
  curly: ["error", "multi-line"],
  "no-var": "error",
  "prefer-const": "error",
  "no-shadow": "error",
  "no-implicit-globals": "error",
  "no-unused-vars": ["error", { caughtErrors: "all" }],
  "no-restricted-properties": [
    "error",
    { property: "innerHTML", message: "Names and metadata come from strangers: text only." },
    { property: "outerHTML", message: "Names and metadata come from strangers: text only." },
    { property: "insertAdjacentHTML", message: "Names and metadata come from strangers: text only." },
  ],
  "max-lines": ["error", 250],
  "max-lines-per-function": ["error", { max: 120, skipComments: true }],
  complexity: ["error", 12],
};

export default [
  { files: ["web/**/*.js"], languageOptions: { globals: globals.browser }, rules: strict },
  { files: ["tests/web/**/*.js"], languageOptions: { globals: globals.node }, rules: strict },
];
